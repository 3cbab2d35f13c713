"""The paper's tables and figures as experiments, and the pre-training of the tiny models that they are made with: a
package of the repository that the wheel leaves out.
"""
