"""Shipped hardware profiles (JSON data)."""
