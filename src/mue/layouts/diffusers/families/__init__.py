"""What is special about single classes of ``diffusers``: one file each, under the class's name."""
