"""Other people's trainers, a file each: how each of them is given the callback. None of them has to be installed."""
