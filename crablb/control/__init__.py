"""Control: small tasks round an engine, each of which could be left out.

They use the engine's public methods, and hear of what befalls it by :attr:`crablb.dataplane.engine.Engine.listeners`.
"""
