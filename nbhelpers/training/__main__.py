"""``python -m nbhelpers.training STAGE``: one heavy stage without a notebook, also on several processes or machines."""

from nbhelpers.pipeline.grid import main_of_training

if __name__ == "__main__":
    main_of_training()
