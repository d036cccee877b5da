"""What JAX and XLA do while a block runs."""

import contextlib

import jax

# Parts of the names of events that JAX reports.
TRACES, COMPILATIONS = "trace", "backend_compile"


@contextlib.contextmanager
def counted(kind: str):
    """A list that holds an entry for every event of a kind in the block."""
    events = []

    def listen(event, duration, **kwargs):
        if kind in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
