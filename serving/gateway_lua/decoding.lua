local decoding = {}
function decoding.pixels() return 0 end
function decoding.enter() end
function decoding.leave() end
return decoding
