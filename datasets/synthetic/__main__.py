import cli
from datasets.synthetic import Options, main

if __name__ == "__main__":
    cli.run(main, Options)
