"""Hangwatch inside of other projects; nothing here is imported by the rest."""
