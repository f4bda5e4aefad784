"""What TrainUtil.py and Test.py are made of, a file for each subject."""
