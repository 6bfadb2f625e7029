"""The ground floor: joules. Sensors, meters, layer profiles and estimates move in here; it imports nothing of ours."""
