"""The control side: gateway (HTTP), scheduler (demand, timers, placement), embedded Redis, command line."""
