"""What would happen: hardware profiles, cost model, residency, policies and the SimPy engine. Imports without torch."""
