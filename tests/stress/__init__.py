"""Long runs under faults that never stop; `make stress-handover`."""
