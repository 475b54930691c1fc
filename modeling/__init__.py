"""What is studied: attention variants, their cache and the GPT around them. Pure torch: no files, no prints, no configs."""
