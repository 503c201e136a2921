from dvq_rt.packages import refuse_strangers

refuse_strangers("training")
