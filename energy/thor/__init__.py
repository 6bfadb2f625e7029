"""What layers cost: measured alone on a device, learnt by kind, summed up for models that never ran there (THOR)."""
