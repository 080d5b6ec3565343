"""What tests of engines share: settings, networks, data, steps, and comparisons of states."""
