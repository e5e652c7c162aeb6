"""Frames to axes: figures of what was measured."""
