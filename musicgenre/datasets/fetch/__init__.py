"""Downloads: data sets from their own hosts, and previews of songs."""
