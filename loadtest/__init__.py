"""Black-box load and timing over HTTP. Imports nothing of the product; drives the ``glowplug`` command and its port."""
