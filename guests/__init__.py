"""Sandboxed WebAssembly guests: binding, module surgery, baking, runtime and the shipped guests."""
