"""What the watcher does: admit workers, visit pages, judge, act, confirm."""
