"""The drop-in pairs: what `local_timer` and `file_based_local_timer` have in common."""
