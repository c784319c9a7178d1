"""What torch.distributed.elastic.timer offers."""

OF_TORCH = {
    "hangwatch.timer": {
        "FileTimerClient",
        "FileTimerRequest",
        "FileTimerServer",
        "LocalTimerClient",
        "LocalTimerServer",
        "TimerClient",
        "TimerRequest",
        "TimerServer",
        "configure",
        "expires",
    },
    "hangwatch.timer.api": {
        "RequestQueue",
        "TimerClient",
        "TimerRequest",
        "TimerServer",
        "configure",
        "expires",
    },
    "hangwatch.timer.local_timer": {
        "LocalTimerClient",
        "LocalTimerServer",
        "MultiprocessingRequestQueue",
    },
    "hangwatch.timer.file_based_local_timer": {
        "FileTimerClient",
        "FileTimerRequest",
        "FileTimerServer",
    },
    "hangwatch.timer.debug_info_logging": {"log_debug_info_for_expired_timers"},
}
"""Public names of torch.distributed.elastic.timer 2.13 by module; tests/interop compares them."""
