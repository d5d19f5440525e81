"""The fault campaign: many clients step many sessions while faults are injected; a checker holds every history against a
reference run. `python tools/chaos.py` runs it; docs/faults.md says what it does."""
