"""The number formats of quantized weights, in NumPy: what loaders read and converters write.

One module per family: ``affine`` (MLX's scale and bias), ``microscaling`` (mxfp4, mxfp8, nvfp4), ``fp8`` (e4m3 with
channel or block scales); ``bits`` lays codes out in 32-bit words. A weight is [..., out, in] and its groups run along
``in``. The modules know arrays only: no file, no tensor name, no model. Start with ``affine``.
"""
