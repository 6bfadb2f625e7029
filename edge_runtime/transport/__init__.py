"""MQTT: one link class, an event loop, and the one transfer protocol for everything over a packet."""
