// The table of this instruction set's kernels; included last in each ISA file.

extern const Kernels kernels = {
    FASTGPT_ISA_NAME,
    {cross_entropy_forward<float>, cross_entropy_forward<double>, cross_entropy_forward<bf16>,
     cross_entropy_forward<fp16>},
    {cross_entropy_backward<float>, cross_entropy_backward<double>, cross_entropy_backward<bf16>,
     cross_entropy_backward<fp16>},
};
