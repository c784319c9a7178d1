"""The page that a worker shares with its watcher: `layout` has its bytes, `view` what they mean."""
