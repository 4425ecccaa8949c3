"""Pictures of what a network learned: the paper's figures and the retrieval page. Needs the extra `report`."""
