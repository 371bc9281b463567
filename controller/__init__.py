"""The central side: registry, compression, fleet, gateway and heavy tier. It never imports the edge agent."""
