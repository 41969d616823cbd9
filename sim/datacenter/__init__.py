"""Many hosts: a control plane that decides from their reports, and hosts that never see each other."""
