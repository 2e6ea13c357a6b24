"""`fastft demo`: one fine-tuning through TRL with stock and with fastft, compared and checked.

runner     the whole demo, its table and demo.json
corpus     the training set: docstrings of the standard library, or the user's data
model      a small decoder, trained and saved
training   one training run and what is measured in it
checks     what must hold for the exit code 0
plot       loss.png
show       what is printed, and what of other libraries is not
"""
