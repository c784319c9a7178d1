"""One thing that must never go wrong, tried ten thousand times: dumps and kills."""
