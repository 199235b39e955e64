"""Neighbours: one file or folder for each library that doratune works with or exchanges adapters with."""
