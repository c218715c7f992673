"""What two processes must agree on: messages, codec, Redis keys, states, error codes, telemetry names, environment."""
