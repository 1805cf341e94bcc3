"""Whole models for serving steps."""
