"""What the tests share: real watchers, real workers, and waiting without sleeping."""
