"""The prediction of a step's memory and time, and the search for the fastest choice that fits."""
