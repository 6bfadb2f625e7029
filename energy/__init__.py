"""The ground floor: joules. Sensors, the meter, layer profiles (THOR), estimates and reports; imports nothing of ours.

Sensors and meter need the standard library alone, predictions NumPy, fitting SciPy, probing onnxruntime; nothing heavy
is imported before it is used.
"""
