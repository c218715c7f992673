"""The compute side: node agent, zygote, worker slot loop, engine, backends and the snapshot builder."""
