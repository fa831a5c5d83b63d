"""The commands of rqc that have more to parse than fits beside the others."""
