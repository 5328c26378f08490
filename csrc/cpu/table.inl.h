// The table of this instruction set's kernels; included last in each ISA file.

extern const Kernels kernels = {
    FASTGPT_ISA_NAME,
    {cross_entropy_forward<float>, cross_entropy_forward<double>, cross_entropy_forward<bf16>,
     cross_entropy_forward<fp16>},
    {cross_entropy_backward<float>, cross_entropy_backward<double>, cross_entropy_backward<bf16>,
     cross_entropy_backward<fp16>},
    {{plan_linear<float>, run_linear<float>},
     {plan_linear<double>, run_linear<double>},
     {plan_linear<bf16>, run_linear<bf16>},
     {plan_linear<fp16>, run_linear<fp16>}},
    {{plan_forward<float>, run_forward<float>},
     {plan_forward<double>, run_forward<double>},
     {plan_forward<bf16>, run_forward<bf16>},
     {plan_forward<fp16>, run_forward<fp16>}},
    {{plan_backward<float>, run_backward<float>},
     {plan_backward<double>, run_backward<double>},
     {plan_backward<bf16>, run_backward<bf16>},
     {plan_backward<fp16>, run_backward<fp16>}},
};
