"""Handing a request's blocks to another instance: orders, tickets, progress, and the process that pushes."""
