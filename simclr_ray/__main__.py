"""`python -m simclr_ray`: the command line where its script is not on the path."""

from simclr_ray.cli.main import program

if __name__ == "__main__":
    program()
