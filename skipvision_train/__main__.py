"""``python -m skipvision_train`` does what the ``skipvision`` script does."""

from skipvision_train.cli import main

if __name__ == "__main__":
    main()
