"""Summaries and rows to tables for the terminal."""
