"""Pictures and tables made from run folders alone; they can be made again at any time. Needs no torch."""
