"""Neighbours: a file or folder for each library that doratune works or exchanges adapters with, and what they share."""
