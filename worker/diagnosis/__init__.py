"""What a host needs to run glowplug: checks with remedies."""
