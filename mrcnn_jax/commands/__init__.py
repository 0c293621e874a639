"""The commands, as `pip install` puts them on the path; train.py, eval.py and predict.py beside the
package call the same."""
