"""The real kernel as an oracle: run guests as processes under this machine's own KSM and record its counters."""
