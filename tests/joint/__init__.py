"""Tests of entangle joint."""
